"""How a job reaches machines: this one, or the Ray cluster that RAY_ADDRESS names."""
