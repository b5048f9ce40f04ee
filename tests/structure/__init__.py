"""Tests that read the tree. Each rule is a function of texts and names, and is tested too."""
