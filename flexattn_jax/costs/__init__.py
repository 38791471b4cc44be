"""What a design costs XLA to compile and to run, on back ends that need not be attached (docs/compile_costs.md)."""
