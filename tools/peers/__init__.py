"""What `symile-dist benchmark data` runs in processes of their own, and the environment of two of the peers."""
