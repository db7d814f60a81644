"""What records say: tables, tests and figures."""
