"""Documents and the token windows cut from them."""
