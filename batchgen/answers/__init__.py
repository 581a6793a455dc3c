"""What an answer has to be, what columns it becomes, and what follows when it is not."""
