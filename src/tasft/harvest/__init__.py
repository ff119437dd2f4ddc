"""From toxic prompts to rows."""
