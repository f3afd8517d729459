"""Reading videos: container files and folders of frames, local or fetched."""
