"""What teal keeps on disk: user folders, artifacts, and the models that come from outside."""
