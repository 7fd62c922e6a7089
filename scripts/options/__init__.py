"""What commands share: options, prompts, suites, comparisons."""
