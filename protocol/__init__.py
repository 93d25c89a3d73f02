"""What both sides say to each other: messages, codec, transfers and the session's state table."""
