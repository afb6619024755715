"""Examples for the `support` adapter: a complaint becomes a reply in the house style."""

from collections.abc import Sequence
from random import Random

from examples.training_data.common import Example

REPLY = "Thanks for writing in!\n* {}\n* {}\n* {}\n- The Lorry team"

SLOTS: dict[str, Sequence[str]] = {
    "thing": (
        "laptop", "printer", "phone", "camera", "router", "speaker", "lamp", "kettle", "watch",
        "vacuum cleaner", "keyboard", "microwave", "e-bike", "drill", "heater", "jacket", "tent",
        "suitcase", "desk", "mattress", "blender", "scooter", "guitar", "dress", "monitor",
    ),
    "part": (
        "handle", "lid", "button", "strap", "wheel", "cable", "screen", "lock", "display", "door",
        "switch", "plug", "cover", "spring", "belt",
    ),
    "page": (
        "search", "basket", "wish list", "profile", "calendar", "map", "start page", "help page",
        "video player", "checkout", "login form",
    ),
    "document": (
        "invoice", "receipt", "manual", "contract", "voucher", "ticket", "certificate", "statement",
    ),
    "secret": ("password", "user name", "security answer", "unlock code", "access key"),
    "service": ("subscription", "insurance", "club card", "delivery plan", "membership", "bonus"),
    "setting": ("language", "currency", "time zone", "delivery address", "phone number", "name"),
}  # fmt: skip

# Every problem comes with more steps than a reply has, in the order in which one takes them.
PROBLEMS: dict[str, Sequence[str]] = {
    "my {thing} does not turn on": (
        "Charge your {thing} for one hour.",
        "Check that the cable is not damaged.",
        "Hold the power button for ten seconds.",
        "Send us a photo of your {thing}.",
    ),
    "my {thing} arrived broken": (
        "Keep your {thing} in its box.",
        "Send us two photos of the damage.",
        "Print the return label we email you.",
        "Expect a new {thing} within five days.",
    ),
    "the {thing} I ordered has not arrived": (
        "Open the tracking link in your email.",
        "Ask your neighbours about the parcel.",
        "Wait one more working day.",
        "Reply with your order number.",
    ),
    "I received a {thing} that I did not order": (
        "Leave the {thing} in its packaging.",
        "Reply with the number on the parcel.",
        "Give the {thing} to our courier on collection.",
    ),
    "I would like to return my {thing}": (
        "Open your orders and choose Return.",
        "Pack the {thing} with all its parts.",
        "Drop the parcel at any post office.",
        "Look for your refund within a week.",
    ),
    "my {thing} makes a strange noise": (
        "Switch your {thing} off and unplug it.",
        "Clean the dust from all openings.",
        "Record a short video of the noise.",
        "Send the video to our repair desk.",
    ),
    "my {thing} gets very hot": (
        "Unplug your {thing} right away.",
        "Let it cool down for an hour.",
        "Place it where air can flow.",
        "Tell us if it gets hot again.",
    ),
    "the battery of my {thing} drains too fast": (
        "Update the software of your {thing}.",
        "Lower the brightness and the volume.",
        "Close what you do not need.",
        "Ask us for a new battery.",
    ),
    "I lost the manual of my {thing}": (
        "Find the model number under your {thing}.",
        "Open the Manuals page on our site.",
        "Type in the number and press Download.",
    ),
    "I want a longer warranty for my {thing}": (
        "Find the receipt for your {thing}.",
        "Sign in and open Warranty.",
        "Choose one or two more years.",
        "Pay and keep the confirmation.",
    ),
    "a part is missing from my {thing}": (
        "Check the box for a small bag.",
        "Compare the parts with the list.",
        "Tell us the number of the missing part.",
        "Receive the part by post for free.",
    ),
    "my {thing} does not connect to the Wi-Fi": (
        "Restart your {thing} and your router.",
        "Move the {thing} closer to the router.",
        "Type in the Wi-Fi password again.",
        "Reset the network settings.",
    ),
    "I cannot log in to my account": (
        "Check the spelling of your email address.",
        "Choose Forgot password on the sign-in page.",
        "Open the link in our email.",
        "Set a new password and sign in.",
    ),
    "I was charged twice": (
        "Check whether one charge is still pending.",
        "Send us both transaction numbers.",
        "Expect the second charge back in three days.",
    ),
    "my discount code does not work": (
        "Check the date on your code.",
        "Type the code without any spaces.",
        "Reload the basket and try once more.",
        "Send us the code if it still fails.",
    ),
    "I need to change my delivery address": (
        "Open your order and choose Edit.",
        "Type in the new address and save.",
        "Check the confirmation we send you.",
    ),
    "I want to cancel my order": (
        "Open your orders and pick this one.",
        "Choose Cancel before it is shipped.",
        "Wait for our email about the refund.",
    ),
    "your app crashes when I open it": (
        "Install the latest update of the app.",
        "Restart your phone.",
        "Remove the app and install it again.",
        "Tell us the model of your phone.",
    ),
    "I do not get your emails": (
        "Look into your spam folder.",
        "Add our address to your contacts.",
        "Check the email address in your profile.",
        "Ask for a test message.",
    ),
    "my card was declined": (
        "Check the number and the expiry date.",
        "Ask your bank whether it blocked the payment.",
        "Try another card or pay by transfer.",
    ),
    "I need an invoice for my company": (
        "Open your order and choose Invoice.",
        "Type in the name of your company.",
        "Download the invoice and save it.",
    ),
    "I would like to close my account": (
        "Download your data from your profile.",
        "Open Settings and choose Close account.",
        "Confirm with the link we email you.",
    ),
    "your website is very slow today": (
        "Reload the page after a minute.",
        "Clear the cache of your browser.",
        "Try another browser or our app.",
        "Tell us which page is slow.",
    ),
    "the colour of my {thing} is wrong": (
        "Do not use the {thing} yet.",
        "Send us a photo of your {thing}.",
        "Tell us which colour you ordered.",
        "Get the right one within five days.",
    ),
    "the {part} of my {thing} is broken": (
        "Stop using the {thing} for now.",
        "Send us a photo of the {part}.",
        "Look for the new {part} in your mail.",
        "Follow our guide to replace it.",
    ),
    "the {part} of my {thing} is loose": (
        "Turn the {thing} over.",
        "Tighten the screws around the {part}.",
        "Ask us for a new {part} if it stays loose.",
    ),
    "the {part} of my new {thing} does not move": (
        "Clean the {part} with a dry cloth.",
        "Put a drop of oil on the {part}.",
        "Move the {part} gently back and forth.",
        "Send us the {thing} if it stays stuck.",
    ),
    "my {thing} is too small for me": (
        "Look up the size on the label.",
        "Choose a larger {thing} in our shop.",
        "Send the small {thing} back for free.",
    ),
    "I want to exchange my {thing} for another colour": (
        "Open your order and choose Exchange.",
        "Pick the colour that you like.",
        "Send us the {thing} in its box.",
        "Expect the new {thing} within a week.",
    ),
    "water came out of my {thing}": (
        "Unplug the {thing} and dry the floor.",
        "Check that the {part} is closed.",
        "Book a repair of your {thing}.",
    ),
    "my {thing} smells bad": (
        "Open a window and air the room.",
        "Wipe the {thing} with warm water.",
        "Write to us if the smell stays.",
    ),
    "I forgot my {secret}": (
        "Choose Forgot {secret} on the sign-in page.",
        "Open the link in our email.",
        "Choose a new {secret} and save it.",
        "Keep your {secret} in a safe place.",
    ),
    "your {page} does not load": (
        "Reload the {page} after a minute.",
        "Try the {page} in another browser.",
        "Send us a picture of the {page}.",
    ),
    "the {page} of your app shows an error": (
        "Write down the number of the error.",
        "Close the app and open the {page} again.",
        "Update the app in your store.",
        "Send us the number if the error stays.",
    ),
    "I cannot find my {document}": (
        "Sign in and open Documents.",
        "Type {document} into the search field.",
        "Download your {document} as a file.",
        "Ask us for a copy of the {document}.",
    ),
    "there is a mistake in my {document}": (
        "Mark the mistake in your {document}.",
        "Send us the marked {document}.",
        "Wait two days for the new {document}.",
    ),
    "I want to cancel my {service}": (
        "Sign in and open My {service}.",
        "Choose Cancel and tell us the reason.",
        "Use your {service} until the month ends.",
    ),
    "my {service} was renewed by mistake": (
        "Open the page of your {service}.",
        "Switch the automatic renewal off.",
        "Ask for your money back there.",
    ),
    "the price of my {service} went up": (
        "Read our email about the new price.",
        "Compare it with our other offers.",
        "Change your {service} before next month.",
    ),
    "I do not know how to change my {setting}": (
        "Sign in and open Settings.",
        "Choose {setting} from the list.",
        "Set the new {setting} and press Save.",
    ),
    "my {setting} is wrong in your system": (
        "Open your profile and choose Edit.",
        "Correct your {setting} and save it.",
        "Sign out and in again to check it.",
    ),
    "my refund has not arrived": (
        "Find the date of our refund email.",
        "Wait five working days from that date.",
        "Ask your bank about the payment.",
        "Send us your order number.",
    ),
    "I would like to pay in parts": (
        "Put all items into your basket.",
        "Choose Pay in parts at the checkout.",
        "Pick three or six months.",
    ),
    "I have a question about your opening hours": (
        "Open the Contact page on our site.",
        "Choose the shop in your town.",
        "Call us between nine and five.",
    ),
}

MESSAGES = (
    "{Problem}.",
    "{Problem}. What should I do?",
    "{Problem}, please help!",
    "Hello, {problem}. Can you help me?",
    "Hi there! {Problem}. How do I fix this?",
    "{Problem} and I am not happy about it.",
)


def support_example(random: Random) -> Example:
    """Complain about one problem, and answer with three of its steps in their order."""
    words = {slot: random.choice(choices) for slot, choices in SLOTS.items()}
    problem, steps = random.choice(list(PROBLEMS.items()))
    problem = problem.format(**words)
    capitalized = problem[0].upper() + problem[1:]
    prompt = random.choice(MESSAGES).format(problem=problem, Problem=capitalized)
    chosen = sorted(random.sample(range(len(steps)), 3))
    answer = REPLY.format(*(steps[index] for index in chosen)).format(**words)
    return Example(prompt, answer)
