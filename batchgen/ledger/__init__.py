"""What is durable and what is missing, and the values and files that say so."""
