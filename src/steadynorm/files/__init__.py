"""Local files as users have them: what is shared by all that read tables or images."""
