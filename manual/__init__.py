"""What makes the site of the manual: MkDocs calls `hooks`; the other modules make pages from the code."""
