"""Methods for clients with few labels."""
