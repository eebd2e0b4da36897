"""What is found out about registered versions: two compared, one proved again."""
