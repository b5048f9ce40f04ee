"""A vision-language model small enough to train in minutes, and its accuracy under a KV budget."""
