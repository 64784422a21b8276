"""Text on its way to the prompt: parts of a long text, and words for what is not a word."""
