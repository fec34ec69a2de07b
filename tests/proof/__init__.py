"""The proof that every layout trains like one process."""
