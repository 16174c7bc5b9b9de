"""Bad input, counted: mutations of what people feed, given to the real entry points in this process."""
