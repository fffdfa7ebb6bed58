"""Why an attention layer could not be read."""


class UnreadLayer(Exception):
    """One attention layer cannot be read; the message is the reason, as a clause that ends a sentence."""
