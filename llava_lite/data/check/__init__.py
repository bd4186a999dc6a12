"""The check of records and images before the first step."""
