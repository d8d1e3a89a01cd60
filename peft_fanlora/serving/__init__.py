"""What both methods do to serve many tenants at once."""
