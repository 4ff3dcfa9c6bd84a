"""Generation measured through the real core: cases, floors, and a profile that says where the time goes."""
