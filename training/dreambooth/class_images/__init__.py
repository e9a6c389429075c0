"""Class images: pictures of what a concept is one of, made by the model itself, which hold it to what it knew."""
