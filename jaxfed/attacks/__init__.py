"""What malicious or curious parties do."""
