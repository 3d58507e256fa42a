"""Training and measuring on a rented GPU; see README.md."""
