"""Tables: from the raw rows to a fitted model and its scores."""
