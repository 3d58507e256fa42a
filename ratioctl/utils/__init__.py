"""Small helpers that every other package may import; nothing heavy is loaded here."""
