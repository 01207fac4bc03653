"""The machine: what can be compiled for, and what a compiler made of a program."""
