"""The frozen target model: forward passes over tokens and trees."""
