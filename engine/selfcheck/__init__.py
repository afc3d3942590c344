"""What `engine doctor --gpu` runs: kernels and mechanisms against the truth."""
