"""Global optimisation of atomic structures."""
