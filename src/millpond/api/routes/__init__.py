"""The routes, one file per noun; each declares the permission that it needs."""
