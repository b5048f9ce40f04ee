"""Clients of the policies, one module per framework. Nothing is imported until it is asked for."""
