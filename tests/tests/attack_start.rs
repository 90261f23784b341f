//! An attacker in the way of a jailer that starts: a process of the cell's user lets names in the cell's directory come,
//! go, and lead to what is precious, all through many starts. The jailer starts the cell or refuses; it never follows.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use berth_tests::attack::END;
use berth_tests::guest::{limits, program, times};
use berth_tests::host::process;
use tempfile::TempDir;

const ID: &str = "raced";
const USER: u32 = 34_567;
const PROGRAM: &str = "berth-attacker";

/// Every name that the jailer makes.
const NAMES: [&str; 8] =
    ["dev", "run", "dev/net", "dev/kvm", "dev/net/tun", "dev/urandom", PROGRAM, "berth-attacker.pid"];

/// Starts for each name. A careless jailer is caught in one of ten.
fn rounds() -> usize {
    times(20, 400) as usize
}

/// After so many, a careless jailer is not careless.
const MAX_ROUNDS: usize = 4000;

/// A place for cells, and what must not be touched: a directory with a file, both of root's.
struct Ground {
    base: TempDir,
}

/// All that a jailer led astray could change.
#[derive(Debug, PartialEq, Eq)]
struct Precious {
    entries: Vec<String>,
    content: String,
    owners_and_modes: Vec<(u32, u32)>,
}

impl Ground {
    fn new() -> Ground {
        let base = tempfile::tempdir().unwrap();
        // The user comes through.
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(base.path().join("precious")).unwrap();
        fs::write(base.path().join("precious/file"), "precious").unwrap();
        Ground { base }
    }

    fn root(&self) -> PathBuf {
        self.base.path().join(PROGRAM).join(ID).join("root")
    }

    /// The cell's directory as a caller prepares it: the user's own.
    fn prepare(&self) {
        let _ = fs::remove_dir_all(self.root());
        fs::create_dir_all(self.root()).unwrap();
        chown(self.root(), Some(USER), Some(USER)).unwrap();
    }

    fn precious(&self) -> Precious {
        let directory = self.base.path().join("precious");
        let file = directory.join("file");
        let mut entries: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
            .collect();
        entries.sort();
        let of = |path: &Path| fs::metadata(path).map(|data| (data.uid(), data.mode())).unwrap();
        Precious {
            entries,
            content: fs::read_to_string(&file).unwrap(),
            owners_and_modes: vec![of(&directory), of(&file)],
        }
    }

    /// Somebody who plays with this name from now on.
    fn swapper(&self, name: &str) -> Swapper {
        // A link in place of a directory leads to a directory, and one in place of a file to a file.
        let victim = match name {
            "dev" | "run" | "dev/net" => "precious",
            _ => "precious/file",
        };
        let aim = |key: &str, value: PathBuf| format!("{key}={}", value.display());
        let mut command = Command::new(program(PROGRAM));
        command.args(["swap", &format!("name={name}"), &aim("root", self.root())]);
        command.arg(aim("victim", self.base.path().join(victim))).uid(USER).gid(USER);
        let mut child = process::spawn_bound(command.stdout(Stdio::piped()), Vec::new()).unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        Swapper(child)
    }

    fn jailer(&self) -> Command {
        let mut command = Command::new(program("berth-jailer"));
        let user = USER.to_string();
        command.args(["--id", ID, "--uid", &user, "--gid", &user]);
        command.arg("--exec-file").arg(program(PROGRAM)).arg("--chroot-base-dir").arg(self.base.path());
        command.args(["--", "attack", "callers-environment"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

struct Swapper(Child);

impl Drop for Swapper {
    fn drop(&mut self) {
        process::kill(&mut self.0);
    }
}

/// How a jailer ended: true when its program ran, false when it refused.
#[track_caller]
fn ended(child: Child) -> bool {
    let mut child = child;
    let read = |pipe: Option<Box<dyn Read>>| {
        let mut text = String::new();
        pipe.unwrap().read_to_string(&mut text).unwrap();
        text
    };
    let said = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let errors = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    assert!(process::wait_for(&mut child, limits::EXIT), "it runs on");
    match child.wait().unwrap().code() {
        Some(0) if said.contains(END) => true,
        Some(140) if errors.starts_with("berth-jailer: ") => false,
        code => panic!("{code:?}: {said}{errors}"),
    }
}

#[test]
fn a_jailer_is_never_led_to_what_is_not_the_cells() {
    let ground = Ground::new();
    let before = ground.precious();
    let mut all = 0;
    for name in NAMES {
        let mut started = 0;
        for round in 0..rounds() {
            ground.prepare();
            let swapper = ground.swapper(name);
            let jailer = process::spawn_bound(&mut ground.jailer(), Vec::new()).unwrap();
            started += usize::from(ended(jailer));
            drop(swapper);
            assert_eq!(ground.precious(), before, "{name}, round {round}");
        }
        println!("{name}: {started} of {} cells started, the others were refused", rounds());
        all += started;
    }
    assert!(all < NAMES.len() * rounds(), "nobody was in the jailer's way");
}

/// What the jailer would be without its care: the same names, by path.
fn careless(root: &Path) {
    for name in ["dev", "dev/net", "run"] {
        let _ = fs::create_dir(root.join(name));
    }
    for name in NAMES {
        if !["dev", "dev/net", "run"].contains(&name) {
            let _ = fs::write(root.join(name), "new");
        }
        let _ = chown(root.join(name), Some(USER), Some(USER));
    }
}

#[test]
fn a_careless_jailer_is_led_astray_by_each_name() {
    for name in NAMES {
        let ground = Ground::new();
        let before = ground.precious();
        let mut rounds = 0;
        while ground.precious() == before {
            assert!(rounds < MAX_ROUNDS, "{name} never led it astray");
            ground.prepare();
            let _swapper = ground.swapper(name);
            careless(&ground.root());
            rounds += 1;
        }
        println!("{name}: after {rounds} rounds");
    }
}

#[test]
fn of_two_jailers_at_once_with_one_name_one_at_most_has_the_cell() {
    let ground = Ground::new();
    for round in 0..rounds() {
        let jailers = [(), ()].map(|()| process::spawn_bound(&mut ground.jailer(), Vec::new()).unwrap());
        let started = jailers.map(ended);
        assert!(started != [true, true], "round {round}");
        let cell = ground.root();
        if started != [false, false] {
            // The loser took nothing away from the winner.
            for name in [PROGRAM, "berth-attacker.pid", "dev/kvm"] {
                assert!(cell.join(name).exists(), "round {round}: {name}");
            }
        }
        fs::remove_dir_all(cell.parent().unwrap()).unwrap();
    }
}
