"""Small libraries of PatchVAE and the tools that a person starts."""
