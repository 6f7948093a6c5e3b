"""The page for people at `/ui`: files that the server sends as they are."""
