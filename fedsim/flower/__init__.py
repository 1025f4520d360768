"""The thin skin over Flower: client, server, round loop and launcher."""
