"""Tests of what is shipped: the library's symbols, the wheel, the import."""
