"""What the user wrote, parsed once into one frozen EngineSpec."""
