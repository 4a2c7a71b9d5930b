"""What the routes tell, read from the folders of the workspace."""
