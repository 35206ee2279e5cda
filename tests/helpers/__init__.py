"""What several test files share; nothing here is collected as a test."""
