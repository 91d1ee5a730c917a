"""Names that no file of ours may have: paths, and names that some system cannot have."""

REFUSED = (
    "", " ", ".", "..", "../x", "a/b", "a\\b", "/etc/x", "C:\\x", "c:x", "a..b", ".hidden",
    "fox.", "fox ", " fox", "con", "NUL", "com1", "lpt9.txt", "aux.safetensors", "COM¹",
    "a\nb", "a\0b", "a*b", "a?b", 'a"b', "a<b", "a|b", "x" * 121, "\u202efox",
)  # fmt: skip
