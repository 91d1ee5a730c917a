"""Where each subject goes: the router, the users' masks and words, and the record of it."""
