"""White-box tests of csrc/core through _kvevict_host, a module that is built for them only."""
