"""The small trained model and the digits that ship with the package."""
