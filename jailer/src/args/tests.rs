use super::*;

const NEEDED: &str = "--id vm-1 --exec-file /bin/berth-vmm --uid 1000 --gid 100";

fn read(words: &str) -> Result<Command, ArgsError> {
    parse(["berth-jailer"].into_iter().chain(words.split_whitespace()).map(OsString::from))
}

fn cell(words: &str) -> Args {
    match read(&format!("{NEEDED} {words}")) {
        Ok(Command::Confine(args)) => *args,
        other => panic!("{words}: {other:?}"),
    }
}

#[track_caller]
fn refused(words: &str, expected: &[&str]) {
    let error = match read(words) {
        Err(error) => error.to_string(),
        Ok(command) => panic!("{words}: {command:?}"),
    };
    for part in expected {
        assert!(error.contains(part), "{words}: {part:?} is not in: {error}");
    }
}

#[test]
fn what_is_not_given_is_as_with_firecracker() {
    let args = cell("");
    assert_eq!((args.id.as_str(), args.program.as_path()), ("vm-1", Path::new("/bin/berth-vmm")));
    assert_eq!(args.user, Some((Uid::from_raw(1000), Gid::from_raw(100))));
    assert!(!args.rootless && args.handed.is_empty());
    assert_eq!(args.program_name, "berth-vmm");
    assert_eq!(args.base, Path::new("/srv/jailer"));
    assert_eq!((args.netns, args.daemonize, args.new_session, args.new_pid_ns), (None, false, false, false));
    assert_eq!(args.limits, Limits { files: 2048, file_bytes: None });
    let parent = PathBuf::from("berth-vmm");
    let none = Cgroups { version: Version::V1, parent, is_parent_given: false, settings: vec![] };
    assert_eq!(args.cgroups, none);
    assert!(args.vmm_arguments.is_empty());
}

#[test]
fn every_flag_is_read() {
    let args = cell(
        "--chroot-base-dir /cells --netns /run/netns/a --daemonize --new-session --new-pid-ns --cgroup-version 2 \
         --parent-cgroup a/b --cgroup memory.max=1G --cgroup cpu.weight=5 --resource-limit fsize=4096 \
         --resource-limit no-file=64",
    );
    assert_eq!(
        (args.base.as_path(), args.netns.as_deref()),
        (Path::new("/cells"), Some(Path::new("/run/netns/a")))
    );
    assert!(args.daemonize && args.new_session && args.new_pid_ns);
    assert_eq!(args.limits, Limits { files: 64, file_bytes: Some(4096) });
    let setting = |file: &str, value: &str| Setting { file: file.into(), value: value.into() };
    let settings = vec![setting("memory.max", "1G"), setting("cpu.weight", "5")];
    let groups = Cgroups { version: Version::V2, parent: "a/b".into(), is_parent_given: true, settings };
    assert_eq!(args.cgroups, groups);
}

#[test]
fn what_follows_two_hyphens_is_for_the_vmm_alone() {
    let args = cell("-- --api-sock /a --id x -- y");
    assert_eq!(args.vmm_arguments, ["--api-sock", "/a", "--id", "x", "--", "y"]);
    assert_eq!(args.id, "vm-1");
    assert!(cell("--").vmm_arguments.is_empty());
    // The same word as a value is one.
    assert_eq!(cell("--netns -- --daemonize").netns.as_deref(), Some(Path::new("--")));
}

#[test]
fn a_flag_that_is_needed_is_named() {
    for flag in ["id", "exec-file", "uid", "gid"] {
        let words: Vec<_> = NEEDED.split_whitespace().collect();
        let at = words.iter().position(|word| *word == format!("--{flag}")).unwrap();
        let left = [&words[..at], &words[at + 2..]].concat().join(" ");
        refused(&left, &[&format!("--{flag} is needed")]);
    }
}

#[test]
fn values_that_break_a_rule_are_refused_with_it() {
    let long = "a".repeat(65);
    let cases = [
        ("id", "a/b", "letters"),
        ("id", "..", "letters"),
        ("id", "a_b", "letters"),
        ("id", "\u{e4}", "letters"),
        ("id", long.as_str(), "1 to 64"),
        ("exec-file", "/", "file"),
        ("exec-file", "/bin/..", "file"),
        ("uid", "root", "number"),
        ("uid", "-1", "number"),
        ("uid", "4294967295", "4294967294"),
        ("gid", "4294967296", "4294967294"),
    ];
    for (flag, value, rule) in cases {
        let words: Vec<_> = NEEDED.split_whitespace().collect();
        let at = words.iter().position(|word| *word == format!("--{flag}")).unwrap();
        let mut changed = words.clone();
        changed[at + 1] = value;
        refused(&changed.join(" "), &[&format!("--{flag} is {value:?}"), rule]);
    }
    assert_eq!(cell("").id.len(), 4);
}

#[test]
fn values_of_optional_flags_that_break_a_rule_are_refused_with_it() {
    let cases = [
        ("--cgroup-version 3", "1 or 2"),
        ("--cgroup memory.max", "=<value>"),
        ("--cgroup memory.max=", "=<value>"),
        ("--cgroup max=1", "<controller>."),
        ("--cgroup .max=1", "<controller>."),
        ("--cgroup memory.=1", "<controller>."),
        ("--cgroup ../memory.max=1", "<controller>."),
        ("--parent-cgroup /a", "below the root"),
        ("--parent-cgroup a/../../b", "below the root"),
        ("--parent-cgroup ./a", "below the root"),
        ("--file disk", "NAME=PATH"),
        ("--file =/a", "NAME=PATH"),
        ("--file a/b=/a", "NAME=PATH"),
        ("--file disk=", "NAME=PATH"),
        ("--file disk=:ro", "NAME=PATH"),
        ("--fd disk=2", "from 3 on"),
        ("--fd disk=/a", "NAME=NUMBER"),
        ("--fd a=3 --file a=/a", "--file and --fd do not go together: each name"),
        ("--fd a=3 --fd b=3", "each number"),
        ("--rootless --netns /a", "--rootless and --netns do not go together"),
        ("--resource-limit fsize", "fsize=<bytes"),
        ("--resource-limit fsize=x", "fsize=<bytes"),
        ("--resource-limit fsize=15", "at least 16"),
        ("--resource-limit core=1", "no-file=<number>"),
        ("--daemonize=yes", "takes no value"),
        ("--netns", "wants a value"),
        ("--netns a --netns b", "twice"),
        ("--node 0", "no flag --node"),
        ("-x", "no flag -x"),
        ("--api-sock /a", "no flag --api-sock"),
        ("stray", "no flag \"stray\""),
    ];
    for (words, rule) in cases {
        refused(&format!("{NEEDED} {words}"), &[rule]);
    }
}

#[test]
fn the_value_of_a_control_file_may_have_equals_signs_and_the_file_dots() {
    let parse = |text: &str| setting(OsStr::new(text)).unwrap();
    assert_eq!(parse("io.max=8:0 rbps=1").value, "8:0 rbps=1");
    assert_eq!(parse("memory.swap.max=0").file, "memory.swap.max");
    assert_eq!(parse("hugetlb.2MB.max=0").controller(), "hugetlb");
}

#[test]
fn help_and_version_need_nothing_else() {
    let Ok(Command::Print(help)) = read("--help") else { panic!("no help") };
    for flag in &flags::FLAGS {
        assert!(help.contains(&format!("--{}", flag.name)), "{help}");
    }
    assert_eq!(read("-h"), Ok(Command::Print(help)));
    assert_eq!(read("--version"), Ok(Command::Print(format!("berth-jailer {VERSION}\n"))));
    let Ok(Command::Print(text)) = parse(["/usr/bin/jailer", "--version"].map(OsString::from)) else {
        panic!("no version")
    };
    assert!(text.starts_with("Jailer v1.17.0\n"), "{text}");
}

#[test]
fn under_the_name_of_firecrackers_jailer_all_errors_end_with_1() {
    let jailer = Identity::of(OsStr::new("/usr/bin/jailer"));
    for code in [ExitCode::NoCell, ExitCode::BadArguments] {
        assert_eq!(jailer.exit_code(code), ExitCode::Generic);
        assert_eq!(Identity::of(OsStr::new("berth-jailer")).exit_code(code), code);
    }
    assert_eq!(jailer.exit_code(ExitCode::Ok), ExitCode::Ok);
}

#[test]
fn an_ordinary_user_runs_the_vmm_as_itself_in_a_pid_namespace() {
    let rootless = |words: &str| match read(&format!("--id a --exec-file /b --rootless {words}")) {
        Ok(Command::Confine(args)) => *args,
        other => panic!("{words}: {other:?}"),
    };
    let args = rootless("");
    assert_eq!((args.user, args.rootless, args.new_pid_ns), (None, true, true));
    assert_eq!(rootless("--uid 7 --gid 8").user, Some((Uid::from_raw(7), Gid::from_raw(8))));
    refused("--id a --exec-file /b --rootless --uid 7", &["--gid is needed"]);
}

#[test]
fn a_file_to_hand_over_has_a_name_and_a_path_or_a_number() {
    let args = cell("--file disk=/a:b --fd net=7 --file kernel=/v=1:ro");
    let path = |name: &str, path: &str, is_read_only| Handed {
        name: name.into(),
        source: Source::Path { path: path.into(), is_read_only },
    };
    let descriptor = Handed { name: "net".into(), source: Source::Descriptor(7) };
    assert_eq!(args.handed, [path("disk", "/a:b", false), path("kernel", "/v=1", true), descriptor]);

    let many: Vec<_> = (0..=MAX_HANDED).map(|n| format!("--file n{n}=/a")).collect();
    assert_eq!(cell(&many[..MAX_HANDED].join(" ")).handed.len(), MAX_HANDED);
    refused(&format!("{NEEDED} {}", many.join(" ")), &["64 in all"]);
    let long = "x".repeat(MAX_HANDED_NAME_LENGTH + 1);
    refused(&format!("{NEEDED} --file {long}=/a"), &["64 letters"]);
}

#[test]
fn a_cell_is_removed_by_what_names_it() {
    let removal = |words: &str| match read(words) {
        Ok(Command::Remove(removal)) => removal,
        other => panic!("{words}: {other:?}"),
    };
    let removed = removal("--remove --id vm-1 --exec-file /bin/berth-vmm");
    let Args { id, program_name, base, cgroups, .. } = cell("");
    assert_eq!(removed, Removal { id, program_name, base, cgroups });
    let words =
        "--chroot-base-dir /cells --cgroup-version 2 --parent-cgroup a/b --cgroup memory.max=1G --daemonize";
    let Args { id, program_name, base, cgroups, .. } = cell(words);
    let removed = removal(&format!("{NEEDED} {words} --remove"));
    assert_eq!(removed, Removal { id, program_name, base, cgroups });
    refused("--remove --id vm-1", &["--exec-file"]);
    refused("--remove --exec-file /vmm", &["--id"]);
    refused("--remove --id ../vm --exec-file /vmm", &["--id"]);
}
