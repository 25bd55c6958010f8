"""Literal benchmark commands; raw results are in results/."""
