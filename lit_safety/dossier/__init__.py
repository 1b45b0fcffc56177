"""What is known of a model's safety, on one page that others can check; and where and when an adapter acts."""
