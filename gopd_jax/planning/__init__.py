"""What `gopd_jax.plan` works with: programs compiled for devices that need not be there."""
