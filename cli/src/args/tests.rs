use super::*;
use clap::error::ErrorKind;

fn parse(line: &str) -> Result<Command, clap::Error> {
    Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
}

#[track_caller]
fn run_of(line: &str) -> Run {
    match parse(line).unwrap() {
        Command::Run(run) => run,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn exec_of(line: &str) -> Exec {
    match parse(line).unwrap() {
        Command::Exec(exec) => exec,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definitions_are_sound() {
    definition().debug_assert();
}

/// Scripts have these.
#[test]
fn lines_that_scripts_rely_on_are_understood() {
    let lines = [
        "berth image import --name debian --kernel vmlinuz --initrd initrd.img --cmdline quiet disk.ext4",
        "berth image import --name debian --kernel vmlinuz disk.ext4",
        "berth run debian",
        "berth run --name web --detach --cpus 2 --memory 512M --rm debian -- sleep 5",
        "berth ps --all --json",
        "berth exec web -- ls -l",
        "berth console web",
        "berth logs --follow web",
        "berth stop --time 5 web",
        "berth rm --force web",
        "berth inspect web",
        "berth pause web",
        "berth resume web",
        "berth stats --no-stream --json",
        "berth doctor --json",
        "berth --socket /tmp/b.sock ps",
        "berth ps --socket /tmp/b.sock",
    ];
    for line in lines {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn a_command_for_a_guest_keeps_its_own_flags_with_and_without_dashes_before_it() {
    for line in ["berth exec web -- ls -l --color", "berth exec web ls -l --color"] {
        let exec = exec_of(line);
        assert_eq!(exec.command, ["ls", "-l", "--color"], "{line}");
    }
    assert_eq!(exec_of("berth exec web -- sh -c -- x").command, ["sh", "-c", "--", "x"]);
    let run = run_of("berth run debian --rm -- uname --rm");
    assert!(run.rm);
    assert_eq!(run.command, ["uname", "--rm"]);
    assert_eq!(run_of("berth run debian -- -odd").command, ["-odd"]);
    assert!(run_of("berth run debian").command.is_empty());
}

#[test]
fn the_last_of_flags_that_contradict_each_other_counts() {
    let inside = |line: &str| exec_of(line).inside;
    let both = inside("berth exec -t -T web ls");
    assert_eq!((both.tty, both.no_tty), (false, true));
    let both = inside("berth exec -T -t web ls");
    assert_eq!((both.tty, both.no_tty), (true, false));
    let usual = inside("berth exec -it web ls");
    assert!(usual.tty && usual.interactive);
    let none = inside("berth exec web ls");
    assert!(!none.tty && !none.no_tty && !none.no_stdin);
}

#[test]
fn what_is_not_said_is_left_to_berthd() {
    let run = run_of("berth run debian");
    assert_eq!((run.guest.name, run.guest.cpus, run.guest.memory), (None, None, None));
    assert!(run.guest.restart.is_none() && !run.guest.no_network);
    let Command::Stop(stop) = parse("berth stop web").unwrap() else { panic!() };
    assert_eq!(stop.grace.time, None);
}

#[test]
fn mistakes_are_told_by_kind() {
    let mistakes = [
        ("berth", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ("berth fly", ErrorKind::InvalidSubcommand),
        ("berth run", ErrorKind::MissingRequiredArgument),
        ("berth stop", ErrorKind::MissingRequiredArgument),
        ("berth exec web", ErrorKind::MissingRequiredArgument),
        ("berth run --memory 1.5G debian", ErrorKind::ValueValidation),
        ("berth run --name a_b debian", ErrorKind::ValueValidation),
        ("berth inspect ../x", ErrorKind::ValueValidation),
        ("berth stop --time soon web", ErrorKind::ValueValidation),
        ("berth run --restart sometimes debian", ErrorKind::InvalidValue),
        ("berth set web", ErrorKind::MissingRequiredArgument),
        ("berth ps --quiet --json", ErrorKind::ArgumentConflict),
        ("berth image import disk", ErrorKind::MissingRequiredArgument),
    ];
    for (line, kind) in mistakes {
        assert_eq!(parse(line).unwrap_err().kind(), kind, "{line}");
    }
}

#[test]
fn a_copy_has_one_side_in_a_guest() {
    let sides = |line: &str| match parse(line).unwrap() {
        Command::Cp(cp) => cp.sides(),
        other => panic!("{other:?}"),
    };
    let name = || "web".parse().unwrap();
    let local = || Place::Local("file".into());
    assert_eq!(sides("berth cp web:/x file"), Ok(Copy::Out { name: name(), path: "/x".into(), to: local() }));
    assert_eq!(
        sides("berth cp file web:/x"),
        Ok(Copy::In { from: local(), name: name(), path: "/x".into() })
    );
    assert_eq!(
        sides("berth cp - web:/x"),
        Ok(Copy::In { from: Place::Stream, name: name(), path: "/x".into() })
    );
    assert_eq!(
        sides("berth cp web:/x -"),
        Ok(Copy::Out { name: name(), path: "/x".into(), to: Place::Stream })
    );
    assert!(sides("berth cp a b").unwrap_err().contains("N:PATH"));
    assert!(sides("berth cp a:/x b:/x").unwrap_err().contains("berth cp -"));
    assert!(sides("berth cp a:x b").unwrap_err().contains("a:/x"));
}

#[test]
fn commands_that_come_later_take_anything() {
    for line in
        ["berth snapshot", "berth snapshot --to file web", "berth restore file", "berth fork -n 3 web"]
    {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

/// What a person reads first: each command says what it does in one line, and how it is used.
#[test]
fn each_command_and_flag_has_a_help_text_and_most_have_examples() {
    fn check(command: &clap::Command, path: &str) {
        let about = command.get_about().unwrap_or_else(|| panic!("{path} says nothing")).to_string();
        assert!(about.lines().count() == 1 && about.len() < 110, "{path}: {about}");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let id = argument.get_id();
            let help = argument.get_help().unwrap_or_else(|| panic!("{path} {id} says nothing")).to_string();
            assert!(!help.ends_with('.') && help.len() < 130, "{path} {id}: {help}");
        }
        for inner in command.get_subcommands() {
            check(inner, &format!("{path} {}", inner.get_name()));
        }
        let is_simple =
            !command.get_arguments().any(|argument| argument.get_id() != "json") || command.has_subcommands();
        let is_later = command.get_arguments().any(|argument| argument.get_id() == "arguments");
        let has_examples =
            command.get_after_help().is_some_and(|text| text.to_string().starts_with("Examples:\n"));
        assert!(has_examples || is_simple || is_later || command.is_hide_set(), "{path} has no examples");
    }
    check(&definition(), "berth");
}

/// The lines of the examples are lines that are understood.
#[test]
fn examples_are_understood() {
    fn examples(command: &clap::Command, lines: &mut Vec<String>) {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        lines.extend(text.lines().map(str::to_string));
        command.get_subcommands().for_each(|inner| examples(inner, lines));
    }
    let mut lines = Vec::new();
    examples(&definition(), &mut lines);
    let mut tried = 0;
    for line in &lines {
        // A comment stands behind some spaces; what is before a pipe or behind one is another program's, if it is not ours.
        let line = line.trim_start().split("  ").next().unwrap();
        for part in line.split(['|', '>']).map(str::trim).filter(|part| part.starts_with("berth ")) {
            // What stands in quotes or is another command's output is one word.
            let part = part.replace("$(berth ps --quiet)", "web");
            let words = part.split('\'').enumerate().flat_map(|(index, piece)| match index % 2 {
                0 => piece.split_whitespace().collect(),
                _ => vec![piece],
            });
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{part}: {error}"));
            tried += 1;
        }
    }
    assert!(tried > 40, "{tried}");
}
