"""General and personalised prompts."""
