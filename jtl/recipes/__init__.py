"""The toolshed: whole recipes, short, made to be read and copied."""
